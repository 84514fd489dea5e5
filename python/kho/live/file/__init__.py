"""An image's file: header, metadata, page allocation, arrays in it, locks of readers, and checks of its owner."""
