"""What one does with models, beside training and using them: one file each."""
