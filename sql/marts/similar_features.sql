-- The features whose directions are most similar to a feature's.
--
-- Grain:   one row per other feature, at most 50, the most similar first.
-- Reads:   stg_similar, stg_feature_stats, feature_names
-- Units:   cosine is that of the two decoder rows; n_tokens counts the tokens at which the other feature fires; label
--          is its label.
-- Parameters: feature bigint
-- Ask it:  is there a second feature 12?  from similar_features(12)
create or replace macro similar_features(feature) as table
with found as materialized (
    select other_id, cosine from stg_similar where feature_id = feature
)
select other_id, feature_names.label, found.cosine, others.n_tokens
from found
join stg_feature_stats as others on others.feature_id = other_id
left join feature_names on feature_names.feature_id = other_id
order by found.cosine desc, other_id;
