"""What a run keeps on disk: the directory it owns, its logs, its checkpoint, and whether all went well."""
