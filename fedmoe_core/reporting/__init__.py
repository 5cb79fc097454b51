"""What finished runs came to, read back from their directories: verdict, figures, page."""
