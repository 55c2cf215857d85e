-- How much of what either does both do: the size of the intersection over that of the union.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   n_both, n_one and n_other count tokens; null where nothing is in either.
-- Ask it:  select jaccard_index(2, 3, 5)  -- 0.3333333333333333
create or replace macro jaccard_index(n_both, n_one, n_other) as
(n_both) / ((n_one) + (n_other) - (n_both));
