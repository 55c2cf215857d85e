-- Features that fire together with a feature, or a few tokens before or after it, counted from the values.
--
-- Grain:   one row per other feature that fires there at least once, the largest Jaccard index first. With a shift, the
--          feature itself may be among them.
-- Reads:   tokens_of_feature, values_at, stg_feature_stats, stg_size, stg_shape, token_owners,
--          jaccard_index, mutual_information
-- Units:   n_both counts the tokens t at which the feature fires and the other fires at t + shift, in the same sequence
--          and document. n_feature and n_other count all tokens at which each fires; N counts the encoded tokens.
--          jaccard = n_both / (n_feature + n_other - n_both); pmi = log2(n_both * N / (n_feature * n_other)), in bits.
-- Parameters: feature bigint, shift bigint = 0
-- Ask it:  what fires just before feature 12?  from coactivation(12, -1)
create or replace macro coactivation(feature, shift := 0) as table
with firing as materialized (
    select token_id from tokens_of_feature(feature)
),
shifted as materialized (
    select (token_id + shift::hugeint)::bigint as token_id
    from (
        select token_id, first_token_id, end_token_id
        from token_owners((select list(token_id) from firing))
        cross join stg_shape
        where (position + shift::hugeint) between 0 and context_length - 1
            and (token_id + shift::hugeint) between first_token_id and end_token_id - 1
    )
),
counts as materialized (
    select feature_id as other_id, count(*) as n_both
    from values_at((select list(token_id) from shifted))
    group by feature_id
),
own as (
    select n_tokens as n_feature from stg_feature_stats where feature_id = feature
)
select
    other_id,
    counts.n_both,
    own.n_feature,
    others.n_tokens                                                                     as n_other,
    jaccard_index(counts.n_both, own.n_feature, others.n_tokens)                        as jaccard,
    mutual_information(counts.n_both, own.n_feature, others.n_tokens, n_encoded_tokens) as pmi
from counts
join stg_feature_stats as others on others.feature_id = other_id
cross join own
cross join stg_size
where shift <> 0 or other_id <> feature
order by jaccard desc, counts.n_both desc, other_id;
