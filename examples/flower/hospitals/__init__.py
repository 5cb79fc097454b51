"""The app that the server sends to its SuperNodes; all it does is name fedmoe's own two apps."""
