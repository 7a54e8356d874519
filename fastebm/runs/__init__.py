"""Run folders: the files of a training run, and how a run is loaded from them."""
