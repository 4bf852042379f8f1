"""Everything that knows another library; each is imported only where it is used."""
