"""What a folder must fulfill before it is published."""
