"""Datasets on the Hugging Face Hub: download what is needed, upload what is new."""
