"""Generation of any number of samples of a run to files, and the training images nearest to samples."""
