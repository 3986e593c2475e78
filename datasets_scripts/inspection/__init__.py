"""What labels look like: quality, errors against truth, report, pictures, Rerun, dataset card."""
