"""One file a method. A file in this folder is found by itself: nothing else has to name it.

The folder answers when it is called: ``cl_lib.methods()`` describes every method in it.
"""
