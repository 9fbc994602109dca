"""Media: images (and, beside them, video and audio) in and out, with errors of one line that name the file."""
