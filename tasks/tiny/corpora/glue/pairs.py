"""The sentence-pair tasks: MNLI, RTE, QNLI, QQP, MRPC and STS-B.

Every label is a relation between the two texts. Neither text alone tells it, since every class
draws names, attributes and values alike, and so do word counts of both: what decides is whether
two of them are the same.
"""

from __future__ import annotations

from tasks.tiny.corpora.glue.facts import Source

#: one row: the texts, then the label as the file has it
Row = tuple[str, ...]

# A thing may be near to several others, so that one neighbour does not contradict another.
_NEAR = frozenset({"near"})
#: share of the pairs that do not match which differ in the fact; the others differ in the name (or,
#: in MRPC, a value), which is harder to see
OTHER_FACT_SHARE = 0.6


def _inference(source: Source, relation: str) -> tuple[str, str]:
    """Return a text of two facts and a claim that is in `relation` to it."""
    entity = source.entity(without=_NEAR)
    *said, unsaid = source.facts(entity, 3)
    attribute, value = source.rng.choice(said)
    if relation == "contradiction":
        value = source.other_value(entity, attribute)
    elif relation == "neutral":
        attribute, value = unsaid
    return source.statement(entity.name, said), source.statement(entity.name, [(attribute, value)])


def mnli(source: Source) -> Row:
    """A claim restates a fact of the premise (0), is about another one (1) or denies it (2)."""
    label = source.rng.randrange(3)
    return *_inference(source, ("entailment", "neutral", "contradiction")[label]), str(label)


def rte(source: Source) -> Row:
    """As MNLI, with neutral and contradiction as one class: entailment 0, anything else 1."""
    label = source.rng.randrange(2)
    relation = source.rng.choice(("neutral", "contradiction")) if label else "entailment"
    return *_inference(source, relation), str(label)


def qnli(source: Source) -> Row:
    """The sentence answers the question (0), or tells another fact or of another entity (1)."""
    entity = source.entity()
    asked, other = source.rng.sample(list(entity.facts), 2)
    label = source.rng.randrange(2)
    name, attribute = entity.name, asked
    if label and source.rng.random() < OTHER_FACT_SHARE:
        attribute = other
    elif label:
        name = source.other_name(entity)
    sentence = source.statement(name, [(attribute, entity.facts[attribute])])
    return source.question(entity.name, asked), sentence, str(label)


def qqp(source: Source) -> Row:
    """Questions in other words about the same fact (1), or about another fact or entity (0)."""
    entity = source.entity()
    asked, other = source.rng.sample(list(entity.facts), 2)
    label = int(source.rng.random() < 0.37)
    if label:
        return *source.two_wordings(entity.name, asked), "1"
    first = source.question(entity.name, asked)
    if source.rng.random() < OTHER_FACT_SHARE:
        return first, source.question(entity.name, other), "0"
    return first, source.question(source.other_name(entity), asked), "0"


def mrpc(source: Source) -> Row:
    """The same two facts in other words or order (1), or with one or their entity changed (0)."""
    entity = source.entity()
    *facts, unsaid = source.facts(entity, 3)
    name, again = entity.name, list(facts)
    label = int(source.rng.random() < 0.675)
    if not label:
        changed = source.rng.randrange(2)
        if source.rng.random() < OTHER_FACT_SHARE:
            again[changed] = unsaid
        elif source.rng.random() < 0.5:
            attribute = again[changed][0]
            again[changed] = (attribute, source.other_value(entity, attribute))
        else:
            name = source.other_name(entity)
    source.rng.shuffle(again)
    first = second = source.statement(entity.name, facts)
    while second == first:
        second = source.statement(name, again)
    return first, second, str(label)


#: points of a fact in STS-B: said in both texts; said with another value; not said at all
STSB_POINTS = {"kept": 1.0, "changed": 0.5, "dropped": 0.0}
#: factor of the score where the texts are about two entities
STSB_OTHER_ENTITY = 0.4


def stsb(source: Source) -> Row:
    """Similarity from 0 to 5: the mean of `STSB_POINTS` over the facts, less for another entity."""
    entity = source.entity()
    number = 2 if len(entity.facts) > 3 else 1  # as many facts again are needed for the dropped
    drawn = source.facts(entity, 2 * number)
    facts, unsaid = drawn[:number], drawn[number:]
    again, points = [], 0.0
    for attribute, value in facts:
        fate = source.rng.choice(list(STSB_POINTS))
        points += STSB_POINTS[fate]
        if fate == "kept":
            again.append((attribute, value))
        elif fate == "changed":
            again.append((attribute, source.other_value(entity, attribute)))
        else:
            again.append(unsaid.pop())
    source.rng.shuffle(again)
    name, score = entity.name, 5 * points / number
    if source.rng.random() < 0.3:
        name, score = source.other_name(entity), score * STSB_OTHER_ENTITY
    first, second = source.statement(entity.name, facts), source.statement(name, again)
    return first, second, f"{score:.3f}"
