"""Datasets that stay on the Hub, in a bucket or in a shared folder: files come when they are needed."""
