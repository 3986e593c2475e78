"""Uploading to the Hub and comparing what comes back."""
