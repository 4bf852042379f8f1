"""What touches the disk: atomic writes, safe reads, and the library's own directory format."""
