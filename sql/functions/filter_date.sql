-- A date of the filter; an error if it is none.
--
-- Grain:   scalar.
-- Reads:   as_timestamp
-- Units:   UTC; null for null. name is the parameter's, for the error.
-- Ask it:  select filter_date('since', '1813')
create or replace macro filter_date(name, word) as
case
    when word is null or as_timestamp(word::varchar) is not null then as_timestamp(word::varchar)
    else error(name || ' is ''' || left(word::varchar, 80) || ''', but it must be a date such as 1813-01-28')
end;
