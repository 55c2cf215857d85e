-- The features that fire on a vocabulary entry, under a filter.
--
-- Grain:   one row per feature that fires on a token of the entry, the largest score first; ties by feature; at most
--          n.
-- Reads:   under_filter_of_entry, is_beyond, stg_token_major, stg_feature_stats, stg_size, feature_names
-- Units:   n_entry counts the entry's encoded tokens that the filter lets through. If there are more than 5,000, 5,000
--          of them are drawn: see draw_order. n_counted counts the tokens that are looked at, n_tokens those of them
--          at which the feature fires, and share = n_tokens / n_counted. density is the feature's share of all encoded
--          tokens, without a filter, and lift = share / density. score = share * log2(lift), in bits. mean_value is in
--          the units of the activations. own_share = share * n_entry / the feature's tokens: how much of its firing is
--          on this entry (without a filter). The filter is that of feature_numbers.
-- Parameters: vocab bigint, n bigint = 50, source text = null, document_key text = null, since text = null,
--          until text = null, role text = null, threshold double = 0, with_feature bigint = null,
--          without_feature bigint = null
-- Ask it:  what does the model see in this word?  from entry_features(4711)
create or replace macro entry_features(
    vocab,
    n := 50,
    source := null,
    document_key := null,
    since := null,
    until := null,
    role := null,
    threshold := 0,
    with_feature := null,
    without_feature := null
) as table
with drawn as materialized (
    from under_filter_of_entry(vocab, source, document_key, since, until, role, with_feature, without_feature)
),
counts as (
    select feature_id, count(*) as n_tokens, avg(value::double) as mean_value
    from stg_token_major
    where token_id in (select token_id from drawn)
        and case when coalesce(threshold, 0) = 0 then true else is_beyond(value, threshold::double) end
    group by feature_id
),
shares as (
    select
        feature_id,
        counts.n_tokens,
        n_counted,
        n_entry,
        counts.n_tokens / n_counted                            as share,
        stats.n_tokens / n_encoded_tokens                      as density,
        counts.n_tokens / n_counted * n_entry / stats.n_tokens as own_share,
        counts.mean_value
    from counts
    join stg_feature_stats as stats using (feature_id)
    cross join stg_size
    cross join (select any_value(n_entry) as n_entry, any_value(n_counted) as n_counted from drawn)
)
select
    feature_id,
    feature_names.label,
    n_tokens,
    n_counted,
    n_entry,
    share,
    density,
    share / density               as lift,
    own_share,
    mean_value,
    share * log2(share / density) as score
from shares
left join feature_names using (feature_id)
order by score desc, feature_id
limit n;
