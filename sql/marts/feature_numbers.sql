-- How often and how strongly a feature fires, under a filter.
--
-- Grain:   one row.
-- Reads:   under_filter_of_feature, under_filter_total, stg_document_places, peak_value
-- Units:   n_tokens counts the tokens at which the feature fires; n_encoded counts all encoded tokens that the filter
--          lets through, whatever the threshold; density = n_tokens / n_encoded. n_documents counts documents in which
--          it fires. mean_value, std_value and max_value are over n_tokens, in the units of the activations (null if
--          there are none); in a signed run max_value is the strongest value with its sign. The filter: null means
--          none. source, document_key and role (of a message) are names. `since` is included, `until` is not: see
--          stg_document_places for the dates of documents. Only values above the threshold count (in a signed run, and
--          for a threshold below zero, values below; 0 keeps every value). with_feature fires at every token,
--          without_feature at none.
-- Parameters: feature bigint, source text = null, document_key text = null, since text = null, until text = null,
--          role text = null, threshold double = 0, with_feature bigint = null, without_feature bigint = null
-- Ask it:  how dense is feature 12 in the novels?  from feature_numbers(12, 'novels')
create or replace macro feature_numbers(
    feature,
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
numbers as (
    select
        count(*)                  as n_tokens,
        avg(value::double)        as mean_value,
        stddev_pop(value::double) as std_value,
        peak_value(value)::double as max_value
    from firing
),
spread as (
    select count(distinct document_id) as n_documents
    from firing
    asof join stg_document_places on token_id >= first_token_id
)
select
    n_tokens,
    n_encoded,
    n_tokens / nullif(n_encoded, 0) as density,
    mean_value,
    std_value,
    max_value,
    n_documents
from numbers
cross join spread
cross join under_filter_total(source, document_key, since, until, role, with_feature, without_feature);
