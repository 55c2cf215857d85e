-- Features that fire together with a feature, from stored counts: quick, but at most 50 from each part.
--
-- Grain:   one row per other feature, at most 50 from each part, the largest Jaccard index first.
-- Reads:   stg_coactivation, stg_feature_stats, stg_size, feature_names, jaccard_index,
--          mutual_information
-- Units:   n_both counts tokens. It is exact in a compacted run; otherwise it is a lower bound, because a part keeps
--          only the 50 nearest features of each. n_other counts all tokens at which the other feature fires. jaccard
--          and pmi (bits) are defined as in coactivation, which counts from the values. label is the other feature's
--          label.
-- Parameters: feature bigint
-- Ask it:  what fires together with feature 12?  from coactive_features(12)
create or replace macro coactive_features(feature) as table
with found as materialized (
    select other_id, n_both from stg_coactivation where feature_id = feature
),
own as (
    select n_tokens as n_feature from stg_feature_stats where feature_id = feature
)
select
    other_id,
    feature_names.label,
    found.n_both,
    others.n_tokens                                                                    as n_other,
    jaccard_index(found.n_both, own.n_feature, others.n_tokens)                        as jaccard,
    mutual_information(found.n_both, own.n_feature, others.n_tokens, n_encoded_tokens) as pmi
from found
join stg_feature_stats as others on others.feature_id = other_id
cross join own
cross join stg_size
left join feature_names on feature_names.feature_id = other_id
order by jaccard desc, found.n_both desc, other_id;
