"""Drafts continue whatever is written, and trees hold them within bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language.draft import Drafting, MotionDraft, Proposal, TokenTree
from odvla.language.grammar import Range, plan_grammar
from odvla.language.waypoints import PlanForm, format_waypoints

TOKENIZER = fake_tokenizer(vocab_size=500)
HISTORY = np.array([[0.0, -9.0], [0.0, -6.0], [0.0, -3.0]])
FORMS = [PlanForm(), PlanForm(signed_zero=True), PlanForm("offsets", 2), PlanForm("changes", 1)]
GRAMMARS = {
    form: plan_grammar(TOKENIZER, decimals=form.decimals, signed_zero=form.signed_zero)
    for form in FORMS
}


def draft_of(form, history=HISTORY):
    return MotionDraft(TOKENIZER, GRAMMARS[form], form, history)


def walked(grammar, ids):
    state = grammar.start
    for token in ids:
        state = grammar.steps[state].get(token)
        if state is None:
            return None
    return state


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMS),
    arrays(np.float64, (6, 2), elements=st.floats(-14, 14)),
    arrays(np.float64, (3, 2), elements=st.floats(-14, 14)),
    st.floats(0, 1),
)
def test_a_draft_goes_on_from_any_place_of_any_plan(form, plan, history, share):
    draft, grammar = draft_of(form, history), GRAMMARS[form]
    text = format_waypoints(plan, form, -history[-1])
    ids = TOKENIZER.text_ids(text)
    if walked(grammar, ids) is None:  # a step of over 100 m
        return
    written = ids[: round(share * len(ids))]
    proposal = draft.propose(written)
    assert len(proposal.tokens) == len(proposal.spread)
    whole = draft.whole_text("".join(grammar.text_of[token] for token in written))
    assert whole is not None
    assert whole.startswith("".join(grammar.text_of[token] for token in written))
    if walked(grammar, TOKENIZER.text_ids(whole)) is not None:  # the guess may leave the range
        assert grammar.accepts([*written, *proposal.tokens])


def test_a_car_that_drives_on_is_guessed_to_the_letter():
    straight = np.stack([np.zeros(6), 3.0 * np.arange(1, 7)], 1)
    for form in FORMS:
        draft = draft_of(form)
        ids = TOKENIZER.text_ids(format_waypoints(straight, form, -HISTORY[-1]))
        assert draft.propose([]).tokens == [*ids, TOKENIZER.end_id]


def test_a_car_that_turns_is_guessed_to_turn_on():
    angle = 0.1 * np.arange(-4, 7)
    circle = 30 * np.stack([1 - np.cos(angle), np.sin(angle)], 1)
    text = format_waypoints(circle[5:])
    assert draft_of(FORMS[0], circle[:4]).whole_text("") == text


def test_the_guess_follows_what_is_written():
    draft = draft_of(FORMS[0])
    # It was guessed to be at 3.00 and 6.00; it is slower.
    guess = draft.whole_text("<traj_start>[(0.00,2.00),(0.00,4.00),(0.")
    assert guess.startswith("<traj_start>[(0.00,2.00),(0.00,4.00),(0.00,6.00),(0.00,8.00)")
    # 3.00 is guessed next; else the nearest number that begins as written.
    for begun, number in (
        ("2", "2.99"),
        ("3.1", "3.10"),
        ("1", "1.99"),
        ("-", "-0.01"),
        ("4", "4.00"),
    ):
        text = draft.whole_text(f"<traj_start>[(0.00,{begun}")
        assert text.startswith(f"<traj_start>[(0.00,{number})"), begun


def test_what_is_no_beginning_of_a_plan_is_not_continued():
    assert draft_of(FORMS[0]).whole_text("(1.00,") is None


def test_a_tree_spreads_out_where_the_guess_says_so_and_keeps_its_bounds():
    grammar = plan_grammar(TOKENIZER, Range(-9.99, 9.99), Range(-9.99, 9.99))
    draft = MotionDraft(TOKENIZER, grammar, PlanForm(), HISTORY)
    proposal = draft.propose([])
    for most in (1, 5, 20, 60):
        for branches in (False, True):
            tree = TokenTree()
            tree.add(TOKENIZER.end_id, -1, grammar.start)
            tree.grow(proposal, grammar, most, 99, branches=branches)
            assert len(tree) <= most
            for node in range(1, len(tree)):
                parent = tree.parents[node]
                assert parent < node
                assert tree.depths[node] == tree.depths[parent] + 1
                assert grammar.steps[tree.states[parent]][tree.tokens[node]] == tree.states[node]
                assert tree.children[parent][tree.tokens[node]] == node
            fans = [len(children) for children in tree.children if len(children) > 1]
            assert fans == ([10] * len(fans) if branches else [])
            assert bool(fans) == (branches and most >= 20)
    shallow = TokenTree()
    shallow.add(TOKENIZER.end_id, -1, grammar.start)
    shallow.grow(proposal, grammar, 60, 3, branches=True)
    assert max(shallow.depths) == 3


def test_a_guess_that_is_not_allowed_is_cut():
    grammar = GRAMMARS[FORMS[0]]
    ids = TOKENIZER.text_ids("<traj_start>[(abc")
    tree = TokenTree()
    tree.add(TOKENIZER.end_id, -1, grammar.start)
    tree.grow(Proposal(ids, [False] * len(ids)), grammar, 99, 99, branches=True)
    assert TOKENIZER.decode(tree.tokens[1:]) in ("<traj_start>[(", "<traj_start>[")


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"guess": "magic"}, "motion or none"), ({"tokens_per_run": -1}, "at least 1")],
)
def test_settings_that_mean_nothing_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        Drafting(**setting)
