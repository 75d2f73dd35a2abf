"""Packing: the idea of phi3v. Start reading here.

The problem. A document page becomes some 2,500 tokens and 17 crops for the vision tower; a question about it and its
answer are 30 tokens. Training on one question at a time computes the page again for every question, and a batch pads
short examples to the length of long ones; either computes logits for image tokens that carry no loss. Packing computes
every page once, pads nothing, and computes logits where there is a target. The loss and every gradient stay exactly
those of one example at a time.

Six words
---------
page        the images that an example looks at, in order, with the text up to the last image
prefix      the tokens of a page: all examples about the page begin with them (none if an image follows an answer)
branch      the remaining tokens of one example: its question and its answer
tree        a prefix and its branches; an example that shares its page with nobody is a tree with one branch
pack        trees laid end to end in one sequence: one forward pass
layout      where trees, prefixes and branches lie in a pack; the only thing attention needs to know

A pack of two pages and three questions
---------------------------------------
Two photographs, each one tile: 313 image tokens, after the four of `<s><|user|>\\n`. Two questions about the first, one
about the second. `Layout.of([Tree(317, (12, 9), False), Tree(317, (14,), False)])` lays them out:

    token     0         316 317      328 329    337 338       654 655      668
              |-- page 1 --|- branch 0 -|- branch 1 -|-- page 2 --|- branch 2 -|
    position  0         316 317      328 317    325 0         316 317      330
    branch    -1            0            1          -1            2
    tree      0                                     1
    target                       ^^^^         ^^^                       ^^^^^

Positions of a branch continue from the end of its prefix, so that every example has the positions it would have alone:
branch 1 starts at 317 again. The three questions are 669 tokens instead of 986, and 2 images for CLIP instead of 3.

What each token sees
--------------------
    query \\ key   page 1    branch 0   branch 1   page 2    branch 2
    page 1        causal    -          -          -         -
    branch 0      all       causal     -          -         -
    branch 1      all       -          causal     -         -
    page 2        -         -          -          causal    -
    branch 2      -         -          -          all       causal

A token sees the earlier tokens of its own branch and its whole prefix. It never sees another branch or another tree.
That is `Layout.visible`, and it is the definition: every attention backend is tested against this dense mask.

The loss does not see the packing either. Each target row carries a weight, computed for the optimizer step as a whole
(by default the mean over the tokens of an example, then over the examples); the loss of a step is the sum of weight
times cross entropy over all packs and ranks. However the examples fall into packs, the sum is the same.

Where to read on, in this order
-------------------------------
`layout`      the contract between data and model
`loss`        the weighted cross entropy, in chunks when answers are long
`trees`       which examples share a page; how examples become trees: arithmetic on lengths
`schedule`    which examples make an optimizer step, their weights, and how trees fill packs on every rank
`pack`        from token ids and image files to the tensors of a pack
`loader`      packs in order, read ahead by `workers`; `ondisk` keeps the examples out of memory
`phi3v.model.attention`   `attend(layer, q, k, v)` over a layout, with interchangeable backends
`tests/test_exactness.py`  the proof, on the loss and on every gradient

The same layouts serve evaluation (prompts of a page share its prefix) and the scoring of closed label sets (labels are
branches).
"""
