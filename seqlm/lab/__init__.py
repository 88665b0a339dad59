"""Work on whole models that is neither training nor use: bench, check, compare, compress."""
