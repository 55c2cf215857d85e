-- The features that a search finds.
--
-- Grain:   one row per feature, in no order, with the columns of stg_summaries.
-- Reads:   stg_summaries, stg_vocab, feature_names
-- Units:   text is in the feature's label, or in one of its commonest vocabulary entries (top_ids), whatever the case;
--          empty finds all. entry is the vocab_id of one of these entries. The peak is the magnitude of max_value.
--          source is the feature's main_source. null means no condition.
-- Ask it:  from summaries_found('love', null, null, null, 0.1, null, null, null)
create or replace macro summaries_found(
    text, entry, kind, min_density, max_density, min_peak, max_peak, source
) as table
with spelt as (
    select entries.vocab_id
    from stg_vocab as entries
    where text <> '' and contains(lower(entries.whole_piece), lower(text::varchar))
),
named as (
    select tops.feature_id
    from (select feature_id, unnest(top_ids) as top_id from stg_summaries) as tops
    join spelt on tops.top_id = spelt.vocab_id
    union
    select labels.feature_id from feature_names as labels where contains(lower(labels.label), lower(text::varchar))
),
found as (
    from stg_summaries where text = ''
    union all
    from stg_summaries semi join named using (feature_id) where text <> ''
)
select features.*
from found as features
where (kind is null or features.kind = kind)
    and (entry is null or list_contains(features.top_ids, entry::bigint))
    and (min_density is null or features.density >= min_density)
    and (max_density is null or features.density <= max_density)
    and (min_peak is null or abs(features.max_value) >= min_peak)
    and (max_peak is null or abs(features.max_value) <= max_peak)
    and (source is null or features.main_source = source);
