"""What is kept beside datasets to read them faster: their columns and decoded frames, by dataset."""
