-- Which features fire on a new text, which need not be in the corpus: saeflow runs the model and the SAE on it.
--
-- Grain:   one row per feature that fires on a token of the text, at most n, the largest score first; ties by feature.
-- Reads:   stg_feature_stats, stg_size, feature_names, telling_score, strength, usual_strength
-- Units:   the text is read as a document of the corpus would be. n_tokens counts its tokens at which the feature
--          fires; share is their share of its tokens. max_value is the strongest value, in the units of the
--          activations; piece is the token that has it, and place counts that token's place from 0. density is the
--          feature's share of all encoded tokens of the corpus; strength is max_value in multiples of the feature's
--          mean value when it fires there; in a signed run its magnitude, in multiples of the root mean square. score =
--          strength * -log2(density), null if it never fires there. model is the folder or hub name of the run's model,
--          if the store does not name it or the folder was moved.
-- Parameters: text text, n bigint = 20, model text = ''
-- Ask it:  what does the model see in a word of mine?  from features_of_text('shipwreck')
create or replace macro features_of_text(text, n := 20, model := '', readings := null) as table
with found as materialized (
    select unnest(
        coalesce(readings, error('features_of_text runs the model: ask it by `saeflow ask`, or in Python'))::struct(
            feature_id bigint, n_tokens bigint, share double, max_value double, place bigint, piece varchar
        )[],
        recursive := true
    )
),
scored as (
    select
        feature_id,
        found.n_tokens,
        share,
        found.max_value,
        piece,
        place,
        stats.n_tokens / nullif(n_encoded_tokens, 0)                  as density,
        strength(found.max_value)
            / usual_strength(nullif(stats.n_tokens, 0), stats.sum_value, stats.sum_squares) as strength
    from found
    join stg_feature_stats as stats using (feature_id)
    cross join stg_size
)
select
    feature_id,
    feature_names.label,
    scored.n_tokens,
    share,
    scored.max_value,
    piece,
    place,
    density,
    strength,
    telling_score(strength, nullif(density, 0)) as score
from scored
left join feature_names using (feature_id)
order by score desc nulls last, feature_id
limit n;
