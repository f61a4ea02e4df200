"""What a run leaves behind: one folder, plain files, one vocabulary. Nothing in here knows torch."""
