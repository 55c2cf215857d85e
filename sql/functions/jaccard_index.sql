-- The Jaccard index of two sets: the size of their intersection over the size of their union.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   n_both, n_one and n_other count tokens; null if both sets are empty.
-- Ask it:  select jaccard_index(2, 3, 5)  -- 0.3333333333333333
create or replace macro jaccard_index(n_both, n_one, n_other) as
(n_both) / nullif((n_one) + (n_other) - (n_both), 0);
