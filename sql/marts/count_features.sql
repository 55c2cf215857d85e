-- How many features of each kind a search finds.
--
-- Grain:   one row per kind with features, the commonest first.
-- Reads:   summaries_found
-- Units:   text is in a feature's label or in one of its 10 commonest vocabulary entries, whatever the case; entry is
--          the vocab_id of one of these entries; kind is one of feature_kind's; densities and peaks (magnitudes of
--          max_value) are included limits; source is the source with most of a feature's tokens. n_features counts
--          features.
-- Parameters: text text = '', entry bigint = null, kind text = null, min_density double = null,
--          max_density double = null, min_peak double = null, max_peak double = null, source text = null
-- Ask it:  how many features of each kind fire on love?  from count_features('love')
create or replace macro count_features(
    text := '',
    entry := null,
    kind := null,
    min_density := null,
    max_density := null,
    min_peak := null,
    max_peak := null,
    source := null
) as table
select features.kind, count(*) as n_features
from summaries_found(text, entry, kind, min_density, max_density, min_peak, max_peak, source) as features
group by features.kind
order by n_features desc, features.kind;
