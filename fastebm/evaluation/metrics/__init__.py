"""How near samples are to real images: distances in features, classifiers, nearest images."""
