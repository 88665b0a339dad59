"""What a training leaves on disk: saved steps and the runs that hold them."""
