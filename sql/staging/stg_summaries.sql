-- Each feature in a line: how often and how strongly it fires, on which entries, where, and of which kind it is.
--
-- Grain:   one row per feature, dead ones too.
-- Reads:   stg_feature_stats, stg_feature_vocab, stg_feature_positions, stg_feature_sources, stg_encoded_tokens,
--          stg_shape, stg_size
-- Units:   kind, density, vocab_share and band_share are those of feature_kind. mean_value and max_value are in the
--          units of the activations (null for dead features), sum_squares in their squares. top_ids are the vocabulary
--          entries on which it fires most often, at most 10, the commonest first; vocab_id is the first; top_counts are
--          their tokens. main_source is the source with most of its tokens, source_share their share of its tokens
--          (null if no document with its tokens has a source, or an earlier saeflow did not count this).
-- Ask it:  which features are dense?
create or replace view stg_summaries as
with entries as (
    select
        feature_id,
        arg_min(vocab_id, (-n_tokens, vocab_id))         as vocab_id,
        max(n_tokens)                                    as n_vocab,
        list(vocab_id order by n_tokens desc, vocab_id)  as top_ids,
        list(n_tokens order by n_tokens desc, vocab_id)  as top_counts
    from stg_feature_vocab
    group by feature_id
),
band_sizes as (
    select band, sum(n_tokens) / sum(sum(n_tokens)) over () as band_size from stg_encoded_tokens group by band
),
bands as (
    select feature_id, max(n_tokens) as n_band, max(n_tokens) filter (where band_size <= 0.25) as n_narrow
    from stg_feature_positions
    left join band_sizes using (band)
    group by feature_id
),
mains as (
    select feature_id, arg_min(spread.source, (-n_tokens, spread.source)) as main_source, max(n_tokens) as n_main
    from stg_feature_sources as spread
    where spread.source is not null and not is_rest and (select has_marginals from stg_shape)
    group by feature_id
),
shares as (
    select
        feature_id,
        n_tokens,
        n_tokens / nullif(n_encoded_tokens, 0) as density,
        sum_value,
        sum_squares,
        max_value,
        vocab_id,
        top_ids[1:10]                          as top_ids,
        top_counts[1:10]                       as top_counts,
        main_source,
        n_main / nullif(n_tokens, 0)           as source_share,
        n_vocab / nullif(n_tokens, 0)          as vocab_share,
        n_band / nullif(n_tokens, 0)           as band_share,
        n_narrow / nullif(n_tokens, 0)         as narrow_share
    from stg_feature_stats
    left join entries using (feature_id)
    left join bands using (feature_id)
    left join mains using (feature_id)
    cross join stg_size
)
select
    feature_id,
    case
        when n_tokens = 0 then 'dead'
        when n_tokens < 10 or density < 1e-6 then 'rare'
        when density > 0.1 then 'dense'
        when vocab_share >= 0.9 then 'single-token'
        when narrow_share >= 0.9 then 'position'
        else 'other'
    end                             as kind,
    n_tokens,
    density,
    sum_value / nullif(n_tokens, 0) as mean_value,
    max_value::double               as max_value,
    sum_squares,
    vocab_id,
    vocab_share,
    band_share,
    top_ids,
    top_counts,
    main_source,
    source_share
from shares;
