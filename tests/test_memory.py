"""What does not fit into memory is refused before any work."""

import pytest

from fastebm.memory import check_memory, free_memory, size_in_words


def test_what_does_not_fit_is_refused() -> None:
    check_memory("little", 10)
    with pytest.raises(ValueError, match=r"much would need 931,322,574,615 GiB|much would need 867\.4 EiB"):
        check_memory("much", 10**21)
    assert free_memory() > 2**20


def test_sizes_have_words() -> None:
    assert [size_in_words(n) for n in (0, 1023, 1536, 2**40)] == ["0 bytes", "1,023 bytes", "1.5 KiB", "1 TiB"]
