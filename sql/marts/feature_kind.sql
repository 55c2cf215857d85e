-- The kind of each feature, by where it fires.
--
-- Grain:   one row per feature, by feature_id, dead ones too.
-- Reads:   stg_feature_stats, stg_feature_vocab, stg_feature_positions, stg_encoded_tokens, stg_size
-- Units:   kind is the first of these that is true:
--          dead          it never fires;
--          rare          it fires on fewer than 10 tokens, or on less than a millionth of them;
--          dense         it fires on more than a tenth of the tokens;
--          single-token  nine tenths of its tokens have one vocabulary entry (vocab_id);
--          position      nine tenths of its tokens lie in one band of positions that has at most a quarter of all;
--          other         none of these.
--          density is the feature's share of the encoded tokens. vocab_share and band_share are the shares of its own
--          tokens that have its commonest entry, and that lie in its commonest band. Bands are those of
--          position_profile.
-- Ask it:  how many features are no more than a word?
create or replace view feature_kind as
with entries as (
    select
        feature_id,
        arg_min(vocab_id, (-n_tokens, vocab_id)) as vocab_id,
        max(n_tokens)                            as n_vocab
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
shares as (
    select
        feature_id,
        n_tokens,
        n_tokens / nullif(n_encoded_tokens, 0) as density,
        vocab_id,
        n_vocab / nullif(n_tokens, 0)          as vocab_share,
        n_band / nullif(n_tokens, 0)           as band_share,
        n_narrow / nullif(n_tokens, 0)         as narrow_share
    from stg_feature_stats
    left join entries using (feature_id)
    left join bands using (feature_id)
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
    end as kind,
    n_tokens,
    density,
    vocab_id,
    vocab_share,
    band_share
from shares
order by feature_id;
