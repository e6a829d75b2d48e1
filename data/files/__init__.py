"""Text in files: which files there are, and their documents, in slices that several processes can read."""
