"""What an analysis leaves behind: the data classes that all rooms pass along, their files, the store."""
