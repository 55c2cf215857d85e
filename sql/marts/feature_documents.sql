-- The documents in which a feature fires most, under a filter.
--
-- Grain:   one row per document in which it fires, the largest sum of values first; ties in corpus order; at most n.
-- Reads:   under_filter_of_feature, stg_document_places, strength, peak_value
-- Units:   n_tokens counts the document's tokens at which the feature fires under the filter; rate is their share of
--          all its tokens. Values are in the units of the activations; top_token_id is the first of the strongest
--          tokens, max_value its value. In a signed run documents are ordered by the sum of magnitudes. The filter is
--          that of feature_numbers.
-- Parameters: feature bigint, n bigint = 20, source text = null, document_key text = null, since text = null,
--          until text = null, role text = null, threshold double = 0, with_feature bigint = null,
--          without_feature bigint = null
-- Ask it:  which novels is feature 12 about?  from feature_documents(12, 20, 'novels')
create or replace macro feature_documents(
    feature,
    n := 20,
    source := null,
    document_key := null,
    since := null,
    until := null,
    role := null,
    threshold := 0,
    with_feature := null,
    without_feature := null
) as table
with fired as materialized (
    from under_filter_of_feature(
        feature, source, document_key, since, until, role, threshold, with_feature, without_feature
    )
),
firing as (
    select token_id, value from fired where passes
),
owned as (
    select token_id, value::double as value, places.*
    from firing
    asof join stg_document_places as places on firing.token_id >= places.first_token_id
)
select
    document_id,
    key,
    owned.source,
    count(*)                                               as n_tokens,
    count(*) / any_value(end_token_id - first_token_id)    as rate,
    sum(value)                                             as sum_value,
    peak_value(value)                                      as max_value,
    min_by(token_id, (-strength(value), -value, token_id)) as top_token_id
from owned
group by document_id, key, owned.source
order by sum(strength(value)) desc, min(first_token_id)
limit n;
