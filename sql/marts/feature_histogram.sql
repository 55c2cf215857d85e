-- How the values of a feature are distributed.
--
-- Grain:   one row per bin with tokens, the weakest first.
-- Reads:   stg_feature_histogram, bin_edge
-- Units:   a bin holds the values from from_value to below to_value, a quarter of an octave, in the units of the
--          activations; share is the bin's share of the tokens at which the feature fires.
-- Parameters: feature bigint
-- Ask it:  does feature 12 fire in two strengths?  from feature_histogram(12)
create or replace macro feature_histogram(feature) as table
select
    bin_edge(bin)                    as from_value,
    bin_edge(bin + 1)                as to_value,
    n_tokens,
    n_tokens / sum(n_tokens) over () as share
from stg_feature_histogram
where feature_id = feature
order by bin;
