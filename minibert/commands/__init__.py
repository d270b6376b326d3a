"""The commands of `minibert`, one file each: its arguments, one call, its printing."""
