-- How often and how strongly each feature fires in each source of documents, summed over the run's parts.
--
-- Grain:   one row per (feature, source) with tokens, and one per feature for the sources that are counted together
--          (is_rest).
-- Reads:   src_feature_sources
-- Units:   sums are in the units of the activations (squared). A part counts its 64 most frequent sources separately.
--          If there are more, tokens of a source that another part counts in its rest are missing here.
-- Ask it:  how often does each feature fire in the novels?
create or replace view stg_feature_sources as
select
    feature_id,
    src_feature_sources.source,
    is_rest,
    sum(n_tokens)::bigint as n_tokens,
    sum(sum_value)        as sum_value,
    sum(sum_squares)      as sum_squares
from src_feature_sources
group by feature_id, src_feature_sources.source, is_rest;
