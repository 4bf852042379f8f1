def nothing(doc):
    return []
