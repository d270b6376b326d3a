"""`minibert bench`: minibert beside its peers, on the same weights, ids and machine."""
