"""Video files of a dataset: depth read from open files, both kinds written, faults explained."""
