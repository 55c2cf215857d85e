-- Features to look at: by label, words, kind, density, strength or source, a page at a time.
--
-- Grain:   one row per feature, the largest sort_key first; ties by feature; at most n.
-- Reads:   summaries_found, stg_vocab, stg_feature_histogram, bin_edge, feature_names, telling_score, usual_strength
-- Units:   text is in a feature's label or in one of its 10 commonest vocabulary entries, whatever the case; entry is
--          the vocab_id of one of these entries; kind is one of feature_kind's; densities and peaks (magnitudes of
--          max_value) are included limits; source is a feature's main_source. sort is interesting, density, rare, max,
--          mean or id. Interesting features have a large telling_score of their usual strength, less 0.9 times the
--          share of their commonest entry; fewer than 100 tokens count in proportion, and dead, rare and dense
--          features have 0. For the next page give sort_key and feature_id of the last row as after_sort and after_id.
--          density is a share of the encoded tokens; values are in the units of the activations. pieces are the 3
--          commonest entries, and those of the 10 that contain the text; shares are their shares of the feature's
--          tokens, main_source is the source with most of these, source_share its share: see stg_summaries. histogram
--          counts the tokens in each quarter octave of magnitudes, from the bin of from_value on.
-- Parameters: text text = '', entry bigint = null, kind text = null, min_density double = null,
--          max_density double = null, min_peak double = null, max_peak double = null, sort text = 'interesting',
--          after_sort double = null, after_id bigint = null, n bigint = 50, source text = null
-- Ask it:  which features have to do with love?  from find_features('love')
create or replace macro find_features(
    text := '',
    entry := null,
    kind := null,
    min_density := null,
    max_density := null,
    min_peak := null,
    max_peak := null,
    sort := 'interesting',
    after_sort := null,
    after_id := null,
    n := 50,
    source := null
) as table
with found as (
    select
        features.*,
        case sort
            when 'interesting' then case
                when features.kind in ('dead', 'rare', 'dense') then 0
                else telling_score(
                    usual_strength(features.n_tokens, features.mean_value * n_tokens, features.sum_squares),
                    features.density
                ) * (1 - 0.9 * coalesce(features.vocab_share, 0)) * least(features.n_tokens / 100, 1)
            end
            when 'density' then coalesce(features.density, 0)
            when 'rare' then -coalesce(features.density, 0)
            when 'max' then coalesce(abs(features.max_value), 0)
            when 'mean' then coalesce(abs(features.mean_value), 0)
            when 'id' then -features.feature_id
            else error(
                'sort is ''' || left(sort, 80) || ''', but it must be interesting, density, rare, max, mean or id'
            )
        end::double as sort_key
    from summaries_found(text, entry, kind, min_density, max_density, min_peak, max_peak, source) as features
),
page as materialized (
    from found
    where after_sort is null
        or sort_key < after_sort
        or (sort_key = after_sort and feature_id > coalesce(after_id, -1))
    order by sort_key desc, feature_id
    limit n
),
words as (
    select feature_id, list(words.piece order by place) as pieces, list(share order by place) as shares
    from (
        select
            feature_id,
            unnest(top_ids)                 as top_id,
            unnest(top_counts) / n_tokens   as share,
            generate_subscripts(top_ids, 1) as place
        from page
    )
    join stg_vocab as words on words.vocab_id = top_id
    where place <= 3 or (text <> '' and contains(lower(words.piece), lower(text::varchar)))
    group by feature_id
),
bins as materialized (
    select feature_id, if(bin < -1024, -2048 - bin, bin) as bin, sum(n_tokens)::bigint as n_tokens
    from stg_feature_histogram
    where feature_id in (select feature_id from page)
    group by all
),
shapes as (
    select feature_id, bin_edge(min(place)) as from_value, list(coalesce(n_tokens, 0) order by place) as histogram
    from (
        select feature_id, unnest(generate_series(min(bin), max(bin))) as place from bins group by feature_id
    )
    left join (select feature_id, bin as place, n_tokens from bins) using (feature_id, place)
    group by feature_id
)
select
    feature_id,
    feature_names.label,
    page.kind,
    page.n_tokens,
    page.density,
    page.mean_value,
    page.max_value,
    coalesce(words.pieces, []) as pieces,
    coalesce(words.shares, []) as shares,
    page.main_source,
    page.source_share,
    shapes.from_value,
    coalesce(shapes.histogram, []) as histogram,
    page.sort_key
from page
left join words using (feature_id)
left join shapes using (feature_id)
left join feature_names using (feature_id)
order by page.sort_key desc, feature_id;
