"""Labels of a dataset: quality, errors against truth, report, pictures, Rerun, dataset card."""
