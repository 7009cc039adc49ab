"""Multiple-choice questions, answered by likelihood: the choice that the model finds most probable after the context.

    questions    a file's lines, each a context, its choices and which one is right
    pairs        each choice behind its context, as ids
    accuracy     how often the right choice has the highest score

Nothing here imports torch: a bad line is refused before any rank starts.
"""
