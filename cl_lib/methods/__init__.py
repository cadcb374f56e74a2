"""One file a method. A file in this folder is found by itself: nothing else has to name it."""
