"""Lowering: every operation as instructions against autograd, what is stored and kept, and what is refused."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm import ops
from fastebm.compiler import candidates, energy_gradient
from fastebm.compiler.capture import capture
from fastebm.compiler.frozen_weights import frozen_weights
from fastebm.compiler.lowering import LoweringError, LoweringResult, lower
from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program
from fastebm.models import CoarseToFineEnergy
from fastebm.ops.instructions import EpilogueOp, Kind
from fastebm.sampling import Langevin
from tests.compiler.networks import Decoder, ResidualNet, TutorialNet, WideNet
from tests.compiler.small_programs import assert_close, tensor


@pytest.fixture(autouse=True)
def without_lanes(request, monkeypatch):
    """Fused programs run what lane programs would take; not in tests of what is left to these."""
    if "lane" not in request.function.__name__ and "others" not in request.function.__name__:
        monkeypatch.setattr(candidates, "_lanes_take", lambda key: False)


def lower_energy(energy, x: Tensor, itemsize: int = 8) -> LoweringResult:
    module = energy if isinstance(energy, nn.Module) else None
    with torch.no_grad():
        return lower(build_gradient_program(capture(energy, module, x), passes=WITHOUT_POLYPHASE), itemsize)


@torch.no_grad()
def run(lowered: LoweringResult, x: Tensor) -> tuple[Tensor, Tensor]:
    fused = ops.CompiledProgram(lowered.program, x.device)
    fused.refresh(*lowered.constants())
    return fused(x)


def assert_lowers(energy, *shape: int) -> LoweringResult:
    """In float64 by the reference to 1e-10, in float32 by what runs here to 1e-5."""
    x = torch.tanh(tensor(*shape, seed=5))
    if isinstance(energy, nn.Module):
        energy = energy.double().eval()
    wanted = energy_gradient(energy, engine="autograd")(x)
    lowered = lower_energy(energy, x)
    for found, expected in zip(run(lowered, x), wanted, strict=True):
        assert_close(found, expected, 1e-10)
    if isinstance(energy, nn.Module):
        single = energy.float()
        found = run(lower_energy(single, x.float(), 4), x.float())
        energy.double()
        for part, expected in zip(found, wanted, strict=True):
            assert (part - expected).norm() <= 1e-5 * expected.norm()
    return lowered


class Summed(nn.Module):
    """A layer between two convolutions, and then a number."""

    def __init__(self, layer: nn.Module, channels: int = 6, out: int = 6):
        super().__init__()
        torch.manual_seed(1)
        self.before = nn.Conv2d(3, channels, 3, padding=1)
        self.layer = layer
        self.after = nn.Conv2d(out, 5, 1)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.after(self.layer(F.silu(self.before(x))))
        return self.head(F.softplus(h).mean((2, 3))).squeeze(1)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


class Tokens(nn.Module):
    """A perceptron on each pixel, as transformers write it: pixels as tokens, channels last."""

    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(6), nn.Linear(6, 11), nn.Linear(11, 6)

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.narrow(F.silu(self.wide(self.norm(tokens))))
        return tokens.transpose(1, 2).unflatten(2, h.shape[2:])


LAYERS = {
    "convolution": lambda: nn.Conv2d(6, 6, 3, padding=1),
    "large kernel": lambda: nn.Conv2d(6, 6, (5, 3), padding=(2, 0)),
    "stride": lambda: nn.Conv2d(6, 6, 4, stride=2, padding=1),
    "stride 3 beyond the kernel": lambda: nn.Conv2d(6, 6, 2, stride=3),
    "stride of one pixel": lambda: nn.Conv2d(6, 6, 1, stride=2),
    "dilation": lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2),
    "no bias": lambda: nn.Conv2d(6, 6, 3, padding=1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(6, 6, 3, padding=1),
    "transposed with stride": lambda: nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1),
    "transposed with output padding": lambda: nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1, output_padding=1),
    "average pool": lambda: nn.AvgPool2d(2),
    "overlapping pool": lambda: nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=3), nn.AvgPool2d(3)),
    "max pool": lambda: nn.MaxPool2d(2),
    "max pool of equals": lambda: nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2), nn.MaxPool2d((2, 3))),
    "max pool of all": lambda: nn.MaxPool2d(8),
    "upsampling": lambda: nn.Upsample(scale_factor=2),
    "batch norm": lambda: nn.BatchNorm2d(6),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "elu": lambda: nn.ELU(0.7),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "falling leaky relu": lambda: nn.LeakyReLU(-0.5),
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(beta=2.0),
    "square": lambda: Lambda(torch.square),
    "relu6": lambda: nn.Sequential(Lambda(lambda h: 9 * h), nn.ReLU6()),
    "hardtanh": lambda: nn.Hardtanh(-0.1, 0.2),
    "clamp": lambda: Lambda(lambda h: h.clamp(-0.1, 0.2) + h.clamp(min=0) * h.clamp(max=0.1)),
    "hardsigmoid": lambda: nn.Sequential(Lambda(lambda h: 9 * h), nn.Hardsigmoid()),
    "hardswish": lambda: nn.Sequential(Lambda(lambda h: 9 * h), nn.Hardswish()),
    "mish": nn.Mish,
    "celu": lambda: nn.CELU(0.5),
    "selu": nn.SELU,
    "log of a sigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
    "softshrink": lambda: nn.Softshrink(0.1),
    "softsign": nn.Softsign,
    "prelu": lambda: nn.PReLU(6),
    "rrelu": nn.RReLU,
    "absolute values": lambda: Lambda(torch.abs),
    "roots and powers": lambda: Lambda(lambda h: torch.sqrt(h**2 + 1) + torch.rsqrt(h**4 + 1) / (2 + h**3)),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "group norm of one group": lambda: nn.GroupNorm(1, 6),
    "layer norm": lambda: nn.LayerNorm([6, 8, 8]),
    "layer norm of channels": lambda: Lambda(
        lambda h: F.gelu(F.layer_norm(h.permute(0, 2, 3, 1), (6,)) * torch.linspace(1, 2, 6).to(h)).permute(0, 3, 1, 2)
    ),
    "rms norm of channels": lambda: Lambda(lambda h: h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6)),
    "squeeze and excitation": lambda: Lambda(
        lambda h: h * F.hardsigmoid(F.adaptive_avg_pool2d(h, 1).view(-1, 6, 1, 1))
    ),
    "a perceptron of pixels": lambda: Tokens(),
    "exp": lambda: Lambda(torch.exp),
    "two users of one value": lambda: Lambda(lambda h: h * torch.sigmoid(h + 1) + 0.3 * h),
    "sum with itself": lambda: Lambda(lambda h: h * (h.sum((1, 2, 3), True) + h.mean((1, 2, 3), True))),
    "product with itself of another": lambda: Lambda(lambda h: F.silu(h) * torch.tanh(h)),
    "padding with a constant": lambda: Lambda(lambda h: F.pad(h, (1, 2, 0, 1), value=0.5)),
    "slices of pixels": lambda: Lambda(lambda h: h[:, :, 1:-1, 2:]),
    "slices of channels": lambda: Lambda(lambda h: torch.cat([h[:, 4:], h[:, :4] * h[:, 1:5]], 1)),
    "rows side by side": lambda: Lambda(
        lambda h: torch.cat([h[:, :, 5:], torch.tanh(h), h[:, :, :2] * h[:, :, 1:3]], 2)
    ),
    "columns side by side": lambda: Lambda(lambda h: torch.cat([h[..., 6:], h[..., :3] * h[..., 1:4]], 3)),
    "glu": lambda: nn.Sequential(nn.Conv2d(6, 12, 1), nn.GLU(dim=1)),
    "image constant": lambda: Lambda(lambda h: h * torch.linspace(0.5, 1, 8, dtype=h.dtype).reshape(1, 1, 8, 1) + 0.1),
    "sum over channels": lambda: Lambda(lambda h: h * h.sum(1, keepdim=True)),
    "mean over pixels": lambda: Lambda(lambda h: h * torch.sigmoid(h.mean((2, 3), keepdim=True))),
    "softmax over channels": lambda: Lambda(lambda h: h + h.logsumexp(1, keepdim=True)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_operation(name):
    assert_lowers(Summed(LAYERS[name]()), 3, 3, 8, 8)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (9, 3)])
def test_odd_sizes(size):
    net = nn.Sequential(nn.Conv2d(2, 7, 3, padding=1), nn.SiLU(), nn.Conv2d(7, 4, 3, stride=2, padding=1), nn.Flatten())
    features = net(torch.zeros(1, 2, *size)).shape[1]
    assert_lowers(nn.Sequential(*net, nn.SiLU(), nn.Linear(features, 9), nn.Tanh(), nn.Linear(9, 1)), 2, 2, *size)


def test_vectors():
    torch.manual_seed(0)
    assert_lowers(nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 1)), 4, 5)
    assert_lowers(lambda x: 0.5 * (x - 1).square().sum(1), 3, 7)
    assert_lowers(lambda x: -torch.logsumexp(-(x.square()), dim=1), 3, 7)


def test_from_a_vector_to_an_image_and_back():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 4 * 3 * 3), nn.SiLU(), nn.Unflatten(1, (4, 3, 3)), nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.ELU(), nn.Linear(45, 1),
    )  # fmt: skip
    assert_lowers(net, 3, 6)


@pytest.mark.parametrize("shape", [(3, 5, 6), (1, 8, 8), (6, 1, 1)])
def test_an_image_that_begins_as_a_vector_is_one(shape):
    torch.manual_seed(0)
    length = math.prod(shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(length, 16), nn.SiLU(), nn.Linear(16, 1))
    assert_lowers(net, 4, *shape)
    lowered = lower_energy(net.double(), torch.zeros(1, *shape, dtype=torch.float64)).program
    assert lowered.sample == (length,)
    assert all(buffer.height == buffer.width == 1 for buffer in lowered.buffers)


class Both(nn.Module):
    """An image that is made a vector, and is read as an image too."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(27, 1), nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)).squeeze(1) + self.conv(x).square().flatten(1).sum(1)


def test_an_image_with_another_use_stays_an_image():
    torch.manual_seed(0)
    assert_lowers(Both(), 2, 3, 3, 3)
    assert lower_energy(Both().double(), torch.zeros(1, 3, 3, 3, dtype=torch.float64)).program.sample == (3, 3, 3)


def test_chains_of_flattened_images_are_the_same_bits_in_any_split():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.SiLU(), nn.Linear(32, 1))
    sampler = Langevin(net, step_size=0.1, noise_std=0.01, engine="fused")
    x = tensor(7, 3, 4, 4).float()
    whole = sampler.sample(x, 20, seed=1)
    assert "runs on fused kernels" in sampler.gradient.describe()
    assert torch.equal(sampler.sample(x, 20, seed=1, batch_size=3), whole)
    expected = Langevin(net, step_size=0.1, noise_std=0.01, engine="autograd").sample(x, 20, seed=1)
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize(("size", "beta"), [(4, 1.0), (8, 0.0), (8, 0.3), (8, 1.0), (32, 0.0), (32, 0.3), (32, 1.0)])
def test_coarse_to_fine(size, beta):
    torch.manual_seed(3)
    net = CoarseToFineEnergy(size, base_width=4, lowest=4).double().eval()
    with frozen_weights(net):
        assert_lowers(functools.partial(net, beta=beta), 2, 3, size, size)


@pytest.mark.parametrize("make", [TutorialNet, ResidualNet, WideNet])
def test_foreign_nets_run_on_fused_kernels(make):
    torch.manual_seed(0)
    net = make()
    x = torch.tanh(tensor(2, 1 if make is TutorialNet else 3, 16, 16)).float()
    gradient = energy_gradient(net, engine="fused")
    gradient(x)
    assert "runs on fused kernels" in gradient.describe()


def test_a_decoder_followed_by_an_energy_runs_on_fused_kernels():
    torch.manual_seed(0)
    gradient = energy_gradient(nn.Sequential(Decoder(), ResidualNet()).eval(), engine="fused")
    gradient(tensor(3, 6).float())
    assert "runs on fused kernels" in gradient.describe()


def test_pointwise_operations_cost_no_instructions_and_derivatives_are_kept():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 4), nn.Flatten())
    lowered = lower_energy(net.double(), torch.zeros(1, 3, 4, 4, dtype=torch.float64)).program
    kinds = [Kind(i.kind) for i in lowered.instructions]
    assert kinds.count(Kind.GATHER) == 0
    assert kinds.count(Kind.CONVOLUTION) == 4
    actions = [EpilogueOp(e.op) for e in lowered.epilogues]
    assert actions.count(EpilogueOp.ACTIVATE_KEEPING) == 1
    assert EpilogueOp.SLOPE not in actions
    # The samples, the activation and its derivative, the seed of the backward part, and one gradient between.
    assert len(lowered.buffers) <= 5


REFUSED = {
    "groups": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=2), "grouped convolution"),
    "padded pool": (lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), "padding"),
    "large max pool": (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.MaxPool2d(16)), "more than 64 pixels"),
    "permuted": (lambda: Lambda(lambda h: h.permute(0, 1, 3, 2)), "Permute"),
    "shuffled": (
        lambda: Lambda(lambda h: h.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)),
        "neither images nor vectors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_runs_as_a_lane_program_and_on_stock_operations_elsewhere(name):
    make, reason = REFUSED[name]
    net = Summed(make()).eval()
    x = torch.tanh(tensor(2, 3, 8, 8)).float()
    with pytest.raises(LoweringError, match=reason):
        lower_energy(net, x, 4)
    wanted = energy_gradient(net, engine="autograd")(x)[1]
    gradient = energy_gradient(net, engine="fused")
    assert (gradient(x)[1] - wanted).norm() < 1e-5 * wanted.norm()
    assert "lane program" in gradient.describe()
    assert gradient.batch_invariant
    with ops.backend("reference"):
        gradient = energy_gradient(net, engine="fused")
        assert (gradient(x)[1] - wanted).norm() < 1e-5 * wanted.norm()
        assert "runs on PyTorch operations" in gradient.describe()
        assert reason in gradient.describe()
        assert not gradient.batch_invariant


@pytest.mark.parametrize("shape", [(20,), (20, 1, 1)])
def test_a_part_of_a_vector_that_meets_an_image_is_left_to_others(shape):
    torch.manual_seed(0)
    linear = nn.Linear(4, 16)

    def energy(x: Tensor) -> Tensor:
        image = torch.tanh(linear(x[:, :4].flatten(1))).unflatten(1, (1, 4, 4))
        pooled = F.avg_pool2d(image, 2).square().flatten(1).sum(1)
        return (image.flatten(1) - x[:, 4:].flatten(1)).square().sum(1) + pooled

    x = tensor(3, *shape).float()
    with pytest.raises(LoweringError, match="slices a vector whose part lies as an image"):
        lower_energy(energy, x, 4)
    gradient = energy_gradient(energy, engine="fused")
    for found, wanted in zip(gradient(x), energy_gradient(energy, engine="autograd")(x), strict=True):
        torch.testing.assert_close(found, wanted)


# ---- the same bits however the batch is split


def normed():
    """Each norm over a map, and the activations of small nets."""
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.InstanceNorm2d(12, affine=True), nn.Mish()),
        *(nn.Conv2d(12, 40, 3, padding=1), nn.GroupNorm(4, 40), nn.Hardswish(), nn.MaxPool2d(2)),
        *(nn.Conv2d(40, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.ReLU6(), nn.Flatten(), nn.Linear(8 * 6 * 5, 1)),
    )


def nets():
    torch.manual_seed(0)
    return {
        "coarse to fine 8": (CoarseToFineEnergy(8, base_width=8), (3, 8, 8)),
        "coarse to fine 32": (CoarseToFineEnergy(32, base_width=8), (3, 32, 32)),
        "tutorial": (TutorialNet(size=28), (1, 28, 28)),
        "residual": (ResidualNet(), (3, 16, 16)),
        "odd wide": (WideNet(), (3, 13, 11)),
        "norms": (normed(), (3, 13, 11)),
    }


@pytest.mark.skipif(ops.backends._extension is None, reason="the C++ operators are not built: library convolutions run")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", nets())
def test_the_same_bits_for_every_batch_and_number_of_threads(name, dtype):
    net, shape = nets()[name]
    x = torch.tanh(tensor(65, *shape)).float()
    gradient = energy_gradient(net, dtype=dtype, engine="fused")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = gradient(x)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for batch in (1, 3, 16, 64, 65):
                for rows in (slice(0, batch), slice(65 - batch, 65)):
                    for part, all_of_it in zip(gradient(x[rows]), whole, strict=True):
                        assert torch.equal(part, all_of_it[rows]), (count, batch)
    finally:
        torch.set_num_threads(threads)


def test_a_chain_that_explodes_leaves_its_neighbours_alone():
    net, shape = nets()["coarse to fine 32"]
    for dtype in (torch.float32, torch.bfloat16):
        gradient = energy_gradient(net, dtype=dtype, engine="fused")
        x = torch.tanh(tensor(20, *shape)).float()
        alone = gradient(x)
        x[7] = math.inf
        x[11, 0, 31, 31] = math.nan
        energies, slopes = gradient(x)
        others = [i for i in range(20) if i not in (7, 11)]
        assert torch.equal(energies[others], alone[0][others])
        assert torch.equal(slopes[others], alone[1][others])
        assert not slopes[11].isfinite().all()
        assert torch.equal(gradient(torch.tanh(tensor(20, *shape)).float())[1], alone[1])


# ---- unchanged weights are not folded again, changed ones always are


def counted(gradient):
    """How often constants were evaluated so far, by a list that grows."""
    executor = next(iter(gradient._compiled._programs.values())).executor
    calls, refresh = [], executor.refresh
    executor.refresh = lambda: (calls.append(1), refresh())[1]
    return calls


def test_constants_are_evaluated_again_only_if_weights_changed():
    net, shape = nets()["residual"]
    x = torch.tanh(tensor(2, *shape)).float()
    gradient = energy_gradient(net, engine="fused")
    first = gradient(x)[1]
    calls = counted(gradient)
    assert torch.equal(gradient(x)[1], first)
    assert not calls or ops.backends._extension is None
    for change in (
        lambda: net.head.weight.data.mul_(1.5),  # of which PyTorch's version counters know nothing
        lambda: net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()}),
        lambda: setattr(net, "head", nn.Linear(16, 1)),
    ):
        change()
        found, wanted = gradient(x)[1], energy_gradient(net, engine="autograd")(x)[1]
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
        assert (found - first).norm() > 1e-3 * first.norm()
        first = found


def test_a_tensor_held_by_reference_is_looked_at_in_every_chain():
    blend = torch.tensor(0.25)

    def energy(x: Tensor) -> Tensor:
        return blend * x.square().sum(1)

    gradient = energy_gradient(energy, engine="fused")
    x = tensor(3, 4).float()
    for value in (0.25, 0.5, 0.5, -1.0):
        blend.fill_(value)
        assert torch.allclose(gradient(x)[1], 2 * value * x)
