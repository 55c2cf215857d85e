-- How often and how strongly each feature fires.
--
-- Grain:   one row per feature, dead ones too.
-- Reads:   stg_feature_stats, stg_tokens
-- Units:   density is a share of all real tokens (0 to 1); values are in the units of the activations,
--          taken over the tokens at which the feature fires (null for dead features).
-- Ask it:  which features are dense (density > 0.1) or nearly dead (n_tokens < 10)?
create or replace view feature_summary as
with corpus as (
    select count(*) as n_corpus_tokens from stg_tokens where mask
)
select
    feature_id,
    n_tokens,
    n_tokens / nullif(n_corpus_tokens, 0)                                            as density,
    sum_value / nullif(n_tokens, 0)                                                  as mean_value,
    sqrt(greatest(sum_squares / nullif(n_tokens, 0) - pow(sum_value / nullif(n_tokens, 0), 2), 0)) as std_value,
    max_value
from stg_feature_stats
cross join corpus
order by feature_id;
