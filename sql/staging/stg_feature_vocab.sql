-- The vocabulary entries on which each feature fires most often, summed over the run's parts.
--
-- Grain:   one row per (feature, vocabulary entry) that is among the feature's first 10 in some part.
-- Reads:   src_feature_vocab
-- Units:   n_tokens and sum_value are lower bounds if the run has several parts, and exact in a compacted run.
-- Ask it:  on which entry does each feature fire most?
create or replace view stg_feature_vocab as
select feature_id, vocab_id, sum(n_tokens)::bigint as n_tokens, sum(sum_value) as sum_value
from src_feature_vocab
group by feature_id, vocab_id;
