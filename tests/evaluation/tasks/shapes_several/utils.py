def images(doc):
    return doc["images"]


def results(doc, answers):
    return {"right": float(answers[0] == doc["answer"])}
