"""An image's file: header, metadata, allocation of pages, arrays in them, readers' locks, and whose files are used."""
